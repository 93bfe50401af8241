"""The stability suite: small trainings that break, and remedies against that. README.md has the reading order."""
