"""Generation: what a request may ask of sampling and scheduling, and the text of its answer.

The engine serves everybody and takes what it is given: a parameter that it cannot use ends it for all. So every
parameter is checked here, in the API process, before it is handed over.
"""
