"""What is measured of runs, and how it is shown: metrics, model card, report page, figures, frontier, benchmark."""
