"""What trains, compares, times and reports: the `lamb16` command and the sweep over C; nothing else imports it.

At their top, command modules import only what a bare installation has; what an extra brings goes through
`lamb16.lab.errors.require`.
"""
