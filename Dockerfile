# The pipelines in a container: docs/how-to/container.md says how it is built and run. tests/test_container.py lints this
# file and executes its steps, without an engine, in a folder and a virtual environment of its own.

# Debian 12 and Python 3.11, where the constraints were tested. By --build-arg BASE=... a mirror's, or one by its digest.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Of pyproject.toml: gpu (CUDA and cuDNN come as wheels; the driver is the host's), dicom, s3, kubeflow; several as gpu,dicom.
ARG EXTRAS=""

# Nobody is told of a run, nor of a program beside ours such as `mlflow`. GitPython: there is no git in here, and MLflow
# need not warn of it.
ENV DO_NOT_TRACK=1 \
    KEDRO_DISABLE_TELEMETRY=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

WORKDIR /lumbarflow

# Dependencies before sources, so that a change of code leaves this layer, of gigabytes, as it is. Kedro looks for
# pyproject.toml, conf and src in the project's folder: the project is installed from there (-e), where src is to come.
# The wheels bring all libraries but those of the slim image (libc, libstdc++, libgcc, libz): nothing to get by apt.
COPY pyproject.toml constraints.txt ./
RUN mkdir src && touch README.md LICENSE \
    && pip install --no-cache-dir -c constraints.txt -e ".${EXTRAS:+[${EXTRAS}]}"

COPY README.md LICENSE .telemetry ./
COPY conf conf
COPY src src

# There is no git in here, and a figure whose commit nobody knows cannot be made again.
ARG COMMIT=""
ENV LUMBARFLOW_COMMIT=${COMMIT}

# Everybody may read the project, whatever the modes in the checkout were, and nobody but root may change it. What runs
# write goes into two folders: the user's, and those of group 0, in which OpenShift puts users whose numbers it draws.
# .viz is for Kedro-Viz's notes of each run, whoever runs it; they are not kept.
RUN python -m compileall -q src \
    && chmod -R u=rwX,go=rX . \
    && install -d -m 1777 .viz \
    && install -d -o 1000 -g 0 -m 775 data mlruns

# HOME and USER: with --user, and in clusters, it is a user of whom /etc/passwd knows nothing. MLflow's database lies in
# the folder of its artefacts, so that both are mounted at once; a server's address from outside takes its place.
ENV HOME=/tmp \
    USER=lumbarflow \
    MLFLOW_TRACKING_URI=sqlite:////lumbarflow/mlruns/mlflow.db

# A number, which Kubernetes can check (runAsNonRoot).
USER 1000

# `docker stop` does what Ctrl+C does: the run's log and MLflow say that it was stopped.
STOPSIGNAL SIGINT

ENTRYPOINT ["kedro"]
CMD ["registry", "list"]
