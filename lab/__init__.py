"""The studies: experiments of the papers at small sizes, on the grid runner. README.md has the reading order."""
