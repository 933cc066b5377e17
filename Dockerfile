# docker build --build-arg EXTRA=tpu -t ip2p .      EXTRA is tpu, cuda or cpu
FROM python:3.12-slim
ARG EXTRA=cpu
WORKDIR /ip2p-jax
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ip2p_jax ip2p_jax
COPY assets/miniature assets/miniature
COPY assets/triplets.jsonl assets/
RUN case "$EXTRA" in cpu) pip install --no-cache-dir . ;; *) pip install --no-cache-dir ".[$EXTRA]" ;; esac
COPY train.py sample.py ./
COPY configs configs
CMD ["ip2p", "--help"]
