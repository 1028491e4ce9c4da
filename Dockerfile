# The image of clusters/kuberay.yaml: Ray, and what this project needs, in the versions of constraints.txt. The code
# itself comes with each job. The base carries CUDA's user-space tools; the head runs it on CPUs as well.
FROM rayproject/ray:2.60.0-py311-gpu
COPY pyproject.toml constraints.txt /tmp/ssn/
RUN python -m pip install --no-cache-dir uv \
    && python -m uv pip install --no-cache --python "$(which python)" \
        -r /tmp/ssn/pyproject.toml boto3 -c /tmp/ssn/constraints.txt
