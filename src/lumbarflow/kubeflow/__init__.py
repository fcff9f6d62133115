"""Kedro's pipelines as Kubeflow pipelines: the command `kedro kubeflow`, see docs/how-to/kubeflow.md.

graph     steps, their order, parameters and resources as plain data, from Kedro's pipelines
compiler  that as a KFP pipeline: its YAML file, a run on this machine, a run on a server
step      what a step does in its container
cli       the commands

This is a plugin of Kedro and uses it; the SDK (the extra kubeflow) is only imported by the compiler.
"""
