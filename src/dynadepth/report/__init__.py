"""What a user is shown: sample answers with their routes, figures, one self-contained page, and the demo's story."""
