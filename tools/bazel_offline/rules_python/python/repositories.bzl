"""Nothing to fetch."""

def py_repositories():
    pass
