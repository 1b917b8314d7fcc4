"""What is measured of runs, and how it is shown: metrics, model card, report page, figures, frontier, benchmark."""

import runtime  # noqa: F401  # refuses an old Python before it reads a module of this package
