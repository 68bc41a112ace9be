/** Some builds of ONNX Runtime send telemetry and write a device's id to the user's cache. Whoever wants that sets 0. */
process.env.ORT_DISABLE_TELEMETRY ??= "1";
