"""The settings: declared in `options`, read by `load`, described by `schema`, handed over by `plain`, compared by
`differences`; `units` and `address` parse words.
"""
