"""Alarms as XLA writes them, and another line of its log."""

SLOW = b"""E1128 10:00:00.000000    77 slow_operation_alarm.cc:73]
********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
********************************
E1128 10:01:00.000000    77 slow_operation_alarm.cc:140] The operation took 3m2.1s

********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
********************************
"""  # noqa: E501
FOLDING = b"""E1128 10:00:00.000000    77 slow_operation_alarm.cc:73] Constant folding an instruction is taking > 1s:

  %reduce-window.1 = f32[64]{0} reduce-window(%broadcast)

This isn't necessarily a bug; constant-folding is inherently a trade-off between compilation time and speed at runtime.

If you'd like to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
"""  # noqa: E501
ERROR = b'E1128 10:00:01.000000    77 cuda_executor.cc:1] failed to allocate 16.0G\n'
