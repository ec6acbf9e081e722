"""What a report's HTML loads, and the scripts that docs/evaluation.md shows."""

import html.parser

from common import ROOT


class Links(html.parser.HTMLParser):
    """All that a page would load, and the texts of its headings and cells."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.images, self.tags = [], 0, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += tag == "img"
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def scripts_of_the_page():
    """The Python of docs/evaluation.md: the detector's, and the features'."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    return [part.partition("```")[0] for part in page.split("```python\n")[1:]]
