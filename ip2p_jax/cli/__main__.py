"""`python -m ip2p_jax.cli`, if the `ip2p` command is not on the path."""

from ip2p_jax.cli.main import main

main()
