# trl_opsd on an image of PyTorch with CUDA (name a tag of it as TORCH), with DeepSpeed and plots, and with vLLM where EXTRAS says so:
#   docker build --build-arg EXTRAS=deepspeed,vllm,plots -t trl-opsd .
#   docker run --gpus all -v $PWD/outputs:/workspace/outputs trl-opsd opsd --config recipes/opsd.yaml --accelerate_config zero2
ARG TORCH=latest
FROM pytorch/pytorch:${TORCH}
ARG EXTRAS=deepspeed,plots
WORKDIR /workspace
COPY pyproject.toml README.md LICENSE ./
COPY trl_opsd trl_opsd
COPY recipes recipes
COPY examples examples
RUN pip install --no-cache-dir ".[${EXTRAS}]" && useradd --create-home trainer && mkdir outputs && chown trainer outputs
USER trainer
ENTRYPOINT ["trl-opsd"]
CMD ["--help"]
