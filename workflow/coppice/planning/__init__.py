"""The job graph that the rules and `coppice plan` read, and what jobs take: memory, disk, time."""
