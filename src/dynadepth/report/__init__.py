"""What a user is shown: sample answers and their routes, figures, one self-contained HTML page, and the demo's story."""
