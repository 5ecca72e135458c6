"""What `selfrag doctor` looks at: packages, devices, the machine, what can be reached."""
