"""Programs that the scripts in launch/ run, as `python -m hvdqn.launchers.NAME`. They import little and start fast."""
