"""Drop-in modules over the operators: constructors, parameters and ``state_dict`` of their ``torch.nn`` counterparts."""
