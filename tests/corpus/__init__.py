"""Every optimizer in every layout: trained, committed, taken back near, and trained on.

`optimizers` has the optimizers, `layouts` and `directories` how their states lie in files,
`training` the runs, `outcome` what one optimizer in one layout comes to.  `python -m tests.corpus`
prints a table of all of them.
"""
