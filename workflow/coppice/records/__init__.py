"""What jobs write and read: typed records, the names of nodes, and where a study's results lie."""
