from layerzoo.testing import conformance

test_early_exit_head = conformance("language:early_exit_head")
