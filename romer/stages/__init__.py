"""The stages of the pipeline: thin Hydra applications around the library, one process per (model, operating point,
stage)."""
