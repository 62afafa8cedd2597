"""`unroll repro`: the stages of the DVC graph as soon as their dependencies are ready, several at a time.

schedule.py    which stage next; failures, signals, exit code
pipeline.py    what DVC knows: the graph, what changed, saving (the only file that imports dvc)
processes.py   stages as process groups of this machine
ray_tasks.py   stages as Ray tasks
table.py       what is shown
"""
