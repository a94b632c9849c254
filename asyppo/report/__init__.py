"""``asyppo report``: runs as one HTML file that needs no network.

``runs.py`` reads what a run wrote, ``sections.py`` says what is asked of it, ``figures.py`` draws, ``tokens.py`` packs
the responses for the token view, ``build.py`` puts the page together from ``page.html``, ``page.css`` and ``page.js``.
"""

from asyppo.report.build import report_at_the_end, write_report

__all__ = ["report_at_the_end", "write_report"]
