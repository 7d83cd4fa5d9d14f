"""The passes over a program, a file each; `_pipeline.py` has their order."""
