"""Make docs/tutorial.ipynb from docs/tutorial.py: `python docs/build_tutorial.py` runs all cells and saves the outputs.

tutorial.py is divided into cells by the lines `# %%` (code), `# %% [markdown]` (text, each line a comment) and
`# %% [solution]` (code that Jupyter and Colab show collapsed).
"""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # figures are outputs, whatever the user has set
COLLAPSED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab, and in JupyterLab


def notebook(source):
    """Return the notebook of the text of tutorial.py, without outputs.

    `{repository}` in Markdown is replaced by the value of REPOSITORY, without https://github.com/.
    """
    repository = re.search(r'^REPOSITORY = "https://github.com/(.*)"', source, re.MULTILINE)[1]
    _, *parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    cells = []
    for kind, text in zip(parts[::2], parts[1::2]):
        options = {"id": f"cell-{len(cells):02}"}
        if kind.strip() == "[markdown]":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE).replace("{repository}", repository)
            cells.append(new_markdown_cell(text.strip(), **options))
        else:
            options |= {"metadata": COLLAPSED} if kind.strip() == "[solution]" else {}
            cells.append(new_code_cell(text.strip(), **options))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(cells, folder=DOCS):
    """Run all cells of a notebook in a new kernel that starts in a folder; return it with the outputs.

    Nothing that changes from one run to the next is kept: no times, and outputs that arrive in pieces are joined.
    """
    metadata = dict(cells.metadata)
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(cells, resources={"metadata": {"path": str(folder)}}, **options).execute(env=os.environ | INLINE)
    cells.metadata = nbformat.from_dict(metadata)  # the kernel adds the version of Python
    return cells


def main():
    cells = execute(notebook((DOCS / "tutorial.py").read_text(encoding="utf-8")))
    nbformat.validate(cells)
    (DOCS / "tutorial.ipynb").write_text(nbformat.writes(cells) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
