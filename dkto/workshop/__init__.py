"""For maintainers: makes the shipped weights, keeps the executed lessons, builds the site. Users need nothing of it."""
