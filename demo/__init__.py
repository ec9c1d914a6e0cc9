"""The small demo models: recipes that train them, their weights, and the runtime text encoder.

`text_encoder` is the only module that a running ComfyUI needs; the others train and export.
"""
