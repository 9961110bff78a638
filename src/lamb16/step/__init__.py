"""The compiled step: what :class:`lamb16.Lamb16` runs over the parameters of a kind, see docs/design.md.

``update.py`` has the functions, ``compiled.py`` runs them, ``plan.py`` makes their blocks of a list of parameters.
"""
