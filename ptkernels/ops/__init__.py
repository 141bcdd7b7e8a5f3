"""One package per operator: the public function, its reference, its registration and its specification."""
