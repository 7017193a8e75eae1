# Two stages: the binary is static, so the image holds nothing else.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=devel
RUN make build VERSION="$VERSION" && mkdir -p /rootfs/run/nbd-export

FROM scratch
COPY --from=build /src/bin/nbd-export /nbd-export
# Not root: give this user access to the image file. The folder of the control
# socket belongs to it; a volume put there from outside must as well.
COPY --from=build --chown=65532:65532 /rootfs/run /run
USER 65532:65532
EXPOSE 10809
HEALTHCHECK --interval=10s --timeout=2s --start-period=5s \
    CMD ["/nbd-export", "status", "--control", "/run/nbd-export/control.sock"]
ENTRYPOINT ["/nbd-export"]
# docker run -v /srv/images:/images nbd-export; --inactive, since a container
# that comes up by itself must not take an image from its owner.
CMD ["serve", "--inactive", "--format", "raw", "--bind", "0.0.0.0", "--port", "10809", \
     "--control", "/run/nbd-export/control.sock", "/images/disk.img"]
