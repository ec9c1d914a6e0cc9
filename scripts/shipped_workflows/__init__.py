"""The workflows for published models, and the stacked demo ones, described in a few lines each; make_workflows.py draws them."""
