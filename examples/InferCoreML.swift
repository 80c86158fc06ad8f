// Classifies a picture with a package that slimvit built, with the preprocessing that the package itself names.
// It is written against Apple's API and was not compiled or run by its authors. macOS 15 or iOS 18:
//     swiftc InferCoreML.swift && ./InferCoreML compressed.fp32.mlpackage picture.jpg
import CoreGraphics
import CoreML
import Foundation
import ImageIO

struct Preprocess: Decodable {
    let input_size: [Int]  // channels, height, width
    let mean, std: [Float]
    let crop_pct: Double?
    let crop_mode: String?
}

enum Failure: Error { case noPreprocess, noPicture, notInThisExample }

/// [1, 3, H, W]: the whole picture where nothing is cropped, else its centre, scaled so that `crop_pct` of it is seen.
func input(_ picture: CGImage, _ how: Preprocess) throws -> MLMultiArray {
    guard how.input_size[0] == 3, ["center", nil].contains(how.crop_mode) else { throw Failure.notInThisExample }
    let (height, width) = (how.input_size[1], how.input_size[2])
    var size = CGSize(width: width, height: height)
    if let share = how.crop_pct {
        let scale = max(Double(width) / Double(picture.width), Double(height) / Double(picture.height)) / share
        size = CGSize(width: Double(picture.width) * scale, height: Double(picture.height) * scale)
    }
    let origin = CGPoint(x: (Double(width) - size.width) / 2, y: (Double(height) - size.height) / 2)
    var pixels = [UInt8](repeating: 0, count: height * width * 4)
    let context = CGContext(data: &pixels, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
                            space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
    context.interpolationQuality = .high
    context.draw(picture, in: CGRect(origin: origin, size: size))
    let array = try MLMultiArray(shape: [1, 3, height as NSNumber, width as NSNumber], dataType: .float32)
    let values = array.dataPointer.bindMemory(to: Float.self, capacity: array.count)
    for channel in 0..<3 {
        for index in 0..<(height * width) {
            let value = Float(pixels[index * 4 + channel]) / 255
            values[channel * height * width + index] = (value - how.mean[channel]) / how.std[channel]
        }
    }
    return array
}

let arguments = CommandLine.arguments
let model = try MLModel(contentsOf: try await MLModel.compileModel(at: URL(fileURLWithPath: arguments[1])))
let metadata = model.modelDescription.metadata[.creatorDefinedKey] as? [String: String] ?? [:]
guard let text = metadata["slimvit.preprocess"] else { throw Failure.noPreprocess }
let how = try JSONDecoder().decode(Preprocess.self, from: Data(text.utf8))
guard let source = CGImageSourceCreateWithURL(URL(fileURLWithPath: arguments[2]) as CFURL, nil),
      let picture = CGImageSourceCreateImageAtIndex(source, 0, nil) else { throw Failure.noPicture }
let name = model.modelDescription.inputDescriptionsByName.keys.first!
let answer = try await model.prediction(from: MLDictionaryFeatureProvider(dictionary: [name: try input(picture, how)]))
let logits = answer.featureValue(for: "logits")!.multiArrayValue!
let classes = (0..<logits.count).sorted { logits[$0].floatValue > logits[$1].floatValue }
print("kind of output:", metadata["slimvit.output"] ?? "logits")
for index in classes.prefix(5) { print("class \(index): \(logits[index])") }
