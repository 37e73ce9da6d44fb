"""Everything in one go: the quickstart and the study on the bundled data."""
