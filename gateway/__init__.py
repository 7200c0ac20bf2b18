"""HTTP for programs and people. May import clients and the broker; no other folder imports a web framework."""
