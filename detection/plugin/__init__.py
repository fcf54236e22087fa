"""Components for MMDetection: a backbone, a neck, an optimizer constructor and a hook. They depend on kw, MMEngine and
MMDetection only, not on `python -m detection`."""
