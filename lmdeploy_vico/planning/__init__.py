"""How fast a deployment would be, and how many GPUs it needs: a cost model and a simulation, without torch."""


class PlanningError(Exception):
    """There is no such deployment; the message says what is wrong, and what works."""
