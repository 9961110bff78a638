"""The step over lists of parameters, eager or compiled: its functions, what runs them, plans, and which are remembered.

``update.py`` and ``factors.py`` have the functions, ``compiled.py`` runs them, ``plan.py`` makes their blocks of a list
of parameters; see docs/design.md.
"""
