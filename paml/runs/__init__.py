"""What a run is, with or without Ray: its folder, journal, result, and how it resumes."""
