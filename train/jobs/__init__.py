"""What `python -m train` and `python -m detection` share: processes, run folders, errors, names, display, services.

It imports neither of them, and `import kw` does not import it.
"""
