# Everything a node of a cluster needs: `docker build -t REGISTRY/depthvar:cuda .`
# --build-arg DEVICE=cpu makes one without CUDA. The GPU's driver comes from the host.
FROM python:3.11-slim-bookworm

# The Ray cluster launcher brings files by rsync, KubeRay looks by wget whether a node is well.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends rsync wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/depthvar
ARG DEVICE=cuda
COPY constraints.txt .
# torch first: the largest layer is made again only when its version changes.
RUN case "$DEVICE" in \
        cuda) set -- ;; \
        cpu) set -- --index-url https://download.pytorch.org/whl/cpu ;; \
        *) echo "got DEVICE=$DEVICE, wanted cuda or cpu" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir --constraint constraints.txt "$@" torch
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[hub,text]' boto3

# Into /usr/local, not a virtual environment: KubeRay starts Ray from a login shell, which forgets
# the image's PATH.
ENV HOME=/home/ray \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --create-home --shell /bin/bash ray
# The user ray, by number: Kubernetes can then see that it is not root.
USER 1000
WORKDIR /home/ray
CMD ["depthvar", "--help"]
