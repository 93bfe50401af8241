"""The grid runner: one command trains the runs of a published table, tabulates them and judges the claims."""
