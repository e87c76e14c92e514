"""What a run costs, before it is paid: parameters, memory and time, from shapes alone."""
