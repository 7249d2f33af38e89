"""The settings: declared in `options`, read by `load`, described by `schema`; `units` and `address` parse words."""
