"""What MMDetection is given: a backbone, a neck, an optimizer constructor and a hook. They stand on kw, MMEngine and
MMDetection alone: nothing here knows of `python -m detection`."""
