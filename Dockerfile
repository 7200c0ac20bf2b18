# The `millstream` command, with what a worker needs.
#
#   TORCH    what pip is given to choose the build of torch. By default pip's own choice, which is CUDA's on x86-64; for
#            the CPU build, a tenth of its size: --build-arg TORCH="--index-url URL torch", with the URL that
#            scripts/setup names.
#   EXTRAS   `worker`, or `demo` for the model that config.yaml names as well.

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY telemetry telemetry
COPY worker worker
COPY client client
COPY cli cli
COPY telemetry telemetry
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH=torch
ARG EXTRAS=worker
COPY constraints.txt /tmp/constraints.txt
# Before the wheel, for the layer's sake: torch changes seldom. Without its dependencies: an index that has torch need
# not have the versions pinned for the rest.
RUN pip install --no-cache-dir --no-deps -c /tmp/constraints.txt ${TORCH}
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/millstream-*.whl)[${EXTRAS}]"

# The cache is made here, so that a volume mounted over it belongs to the user as well.
RUN useradd --system --uid 10001 --create-home millstream \
    && install -d -o millstream -g millstream /srv/millstream /var/cache/huggingface
ENV HF_HOME=/var/cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
USER millstream
WORKDIR /srv/millstream

# Healthy: a worker of this container is loaded and beats. The first start may download weights.
HEALTHCHECK --interval=30s --timeout=15s --start-period=10m --retries=3 \
    CMD millstream queue ls --json | grep -q "\"host\": \"$(hostname)\""
ENTRYPOINT ["millstream"]
CMD ["worker", "run"]
