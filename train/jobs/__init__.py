"""What programs around the library have in common, whatever they train: processes, errors told in a line, safe files.

`import kw` does not import it.
"""
