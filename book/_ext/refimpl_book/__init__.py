"""Whatever the book makes from files: pages, generated sources, and the Sphinx extension that puts pages together.

- `extension`: the Sphinx extension, and the only module that knows Sphinx.
- `pages`: the text that pages ask for with ``<!-- generated: NAME -->``; `caches`, `tasks`, `choosing` and `courses`
  make the parts that belong together, `listing` the tables of papers.
- `generate`: files of the checkout that follow from refimpl/papers.toml, from cards of models or from _config.yml.
- `live`: outputs of notebooks that `make book` executed.
"""
