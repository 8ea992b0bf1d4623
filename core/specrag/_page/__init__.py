"""Pages that show answers, each one HTML file with its styles, scripts and data in it. A page loads nothing.

It stands on plain values, as `SpeculativeAnswer.to_dict` and the rows of an evaluation have them, so that the answer at
the bottom and the reports at the top use the same one.

- `document`: the file: the template, and the data in it.
- `scores`: their headings.
- `examples`: what the page's scripts read: questions with their passages, answers, drafts and scores.
"""

from specrag._page.document import Table, framed, write
from specrag._page.examples import answer_page
from specrag._page.scores import SCORES

__all__ = ["SCORES", "Table", "answer_page", "framed", "write"]
