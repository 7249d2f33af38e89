"""The settings: declared once, read from YAML and the command line, described, handed over and compared.

In reading order:

* `address`: addresses as users write them.
* `units`: quantities with their units, and text with escapes.
* `values`: the kinds of values, each with its parser.
* `fields`: how settings are declared.
* `listener` and `settings`: the declarations of all settings.
* `loader`: from a file and the command line to settings, with all mistakes at once.
* `serialize`: settings handed to another process, and the differences between two.
* `schema`: the JSON Schema and the reference page.
"""
