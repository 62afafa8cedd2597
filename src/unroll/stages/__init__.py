"""The stages of the pipeline, one file each; `dvc.yaml` and the command line call the same functions."""
